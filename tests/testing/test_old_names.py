"""Names of `pullback.testing` that have changed are found for one release, with a warning."""

from __future__ import annotations

import pytest

import pullback.testing
from pullback.testing import BackendUnderTest, faults
from pullback.testing.network.faults import FAULT_KINDS, misbehaving


def test_old_names() -> None:
    """The old spelling is the new object, and the warning says what to write; the new spelling does not warn."""
    with pytest.warns(DeprecationWarning, match=r"Subject is now pullback\.testing\.BackendUnderTest"):
        assert pullback.testing.Subject is BackendUnderTest
    with pytest.warns(DeprecationWarning, match=r"faults\.misbehaving is now pullback\.testing\.network\.faults"):
        assert faults.misbehaving is misbehaving
    with pytest.warns(DeprecationWarning, match="FAULT_KINDS"):
        assert faults.FAULT_KINDS == FAULT_KINDS
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pullback.testing.Nothing
