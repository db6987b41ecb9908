"""What the commands of this folder share: how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from fastmmkd.errors import UserError


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`; bad input is one line and exit code 2, an interruption 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
