"""Start the command: `streamer`, `intruder-streamer`, ``python -m intruder_streamer``.

It stands outside of the package, because another project on the index is called `streamer` and imports as `streamer` too: installed
side by side, its files replace some of these, or come first on the path. Where that is so, one line says it.
"""

from __future__ import annotations

import sys
from typing import NoReturn

ALONE = "install intruder-streamer in an environment of its own"
AGAIN = "pip install --force-reinstall --no-deps intruder-streamer"


def main() -> NoReturn:
    """Run the command that belongs to this project, or exit with a line that says why it cannot be found."""
    try:
        import streamer

        is_ours = "detect_intruder_dimensions" in getattr(streamer, "__all__", ())
    except Exception:  # whatever another project's package does when it is imported
        is_ours = False
    if not is_ours:
        sys.exit(f"intruder-streamer: {whose_it_is()}")
    from streamer.cli.main import main as run

    run()


def whose_it_is() -> str:
    """Say what ``import streamer`` finds in place of this project's package, and what to do."""
    import importlib.metadata
    import importlib.util

    sys.modules.pop("streamer", None)
    spec = importlib.util.find_spec("streamer")
    if spec is None:
        return f"its package `streamer` is not installed; {AGAIN}"
    if spec.origin is None:
        (where, *_) = [*(spec.submodule_search_locations or []), "a directory"]
        return f"files of its package are missing from {where}, as after another project `streamer` was uninstalled; {AGAIN}"
    owners = importlib.metadata.packages_distributions().get("streamer", [])
    others = [name for name in dict.fromkeys(owners) if name.lower().replace("_", "-") != "intruder-streamer"]
    if not others:
        return (
            f"`import streamer` finds {spec.origin}, which is not of this project; rename it, or take it off the path"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in others)
    return (
        f"`import streamer` finds {spec.origin}, a package of another project ({versions}); {ALONE}, or "
        f"pip uninstall {' '.join(others)} and {AGAIN}"
    )


if __name__ == "__main__":
    main()
