for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], rows = [...body.rows];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[head.cellIndex].textContent, number = row => parseFloat(value(row));
  const missing = row => value(row) === "–";
  const numeric = rows.every(row => missing(row) || !Number.isNaN(number(row)));
  const order = (a, b) => numeric ? number(a) - number(b) : value(a).localeCompare(value(b));
  rows.sort((a, b) => missing(a) || missing(b) ? missing(a) - missing(b) : (up ? 1 : -1) * order(a, b));
  body.append(...rows);
});

const filter = document.querySelector(".filter"), wanted = filter.querySelector("input");
const suites = [...document.querySelectorAll(".suite")];
filter.hidden = false;
filter.addEventListener("submit", event => event.preventDefault());
wanted.addEventListener("input", () => {
  const words = wanted.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const fits = row => !words.length || words.some(word => row.cells[0].textContent.toLowerCase().includes(word));
  for (const suite of suites) {
    const rows = [...suite.querySelectorAll("tbody tr")];
    for (const row of rows) row.hidden = !fits(row);
    suite.hidden = rows.every(row => row.hidden);
  }
  const left = suites.filter(suite => !suite.hidden).length;
  filter.querySelector("output").textContent = words.length ? `in ${left} of ${suites.length} suites` : "";
});

for (const link of document.querySelectorAll("[popover] a"))
  link.addEventListener("click", () => link.closest("[popover]").hidePopover());
