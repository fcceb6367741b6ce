"""Robust dynamic data pruning: AlignPrune (CVPR 2026) and the experiments around it."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("alignprune-exp")
    except PackageNotFoundError:  # it lies on PYTHONPATH and is not installed
        return "unknown"
