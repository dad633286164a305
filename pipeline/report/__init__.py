"""One HTML file that shows runs: what they did, what it cost, and why they decided as they did."""

from importlib.util import find_spec

from opd_stream.errors import UserError


def check_libraries() -> None:
    """Refuse to draw without the libraries for it.

    Raises:
        UserError: one of them is not installed.
    """
    for library in ("jinja2", "matplotlib"):
        if find_spec(library) is None:
            raise UserError(
                f"opd-stream report needs the library {library}, which is not installed; "
                "pip install jinja2 matplotlib"
            )
