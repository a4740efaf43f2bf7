"""A tool's `main` called in this process, where importing torch once more would be most of what a test takes."""

import contextlib
import importlib
import io
import subprocess
import sys
from unittest import mock


def call_tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Call the tool with these arguments; exit code and texts are those of a process."""
    line = [f"{name}.py", *map(str, args)]
    out = io.StringIO()
    err = io.StringIO()
    with (
        mock.patch.object(sys, "argv", line),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = importlib.import_module(name).main()
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):  # Python prints it and exits with 1
                err.write(code)
                code = 1
    return subprocess.CompletedProcess(line, code or 0, out.getvalue(), err.getvalue())
