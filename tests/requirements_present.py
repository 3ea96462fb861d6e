"""What a test needs of the machine: skip saying why where it is absent, or fail where nothing may be skipped."""

from __future__ import annotations

import os

import pytest


def require(present: bool, why: str) -> None:
    """Go on where `present`; else skip with `why`, or fail with it when LIVEWEIGHT_TEST_NO_SKIP is 1."""
    if present:
        return
    if os.environ.get("LIVEWEIGHT_TEST_NO_SKIP") == "1":
        pytest.fail(f"nothing may be skipped here, but {why}", pytrace=False)
    pytest.skip(why)
