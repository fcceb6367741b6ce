"""Curation at any size: scores from losses that somebody has logged, as SQL that DuckDB runs, and what to keep by them.

`formulas` has the scores as SQL, `inspect` what the files are, `layout` how they are read without a shuffle where they
allow it, `store` reads them where they are not on disk, `scoring` scores and cuts, part by part, `check` says what is
wrong with them, `engine` does it, `cluster` has many do it, `steps` goes from files to what is kept, and `command` is
what people type.
"""
