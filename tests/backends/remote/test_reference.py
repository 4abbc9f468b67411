"""The base model of a service as the reference: it scores as natively, and checks what it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_data
from servers import SDK_WARNINGS, twin

from pullback.backends.remote import Capabilities
from pullback.datums import Datum, ModelInput
from pullback.errors import ClosedError, ConfigError, InvalidDatumsError, UnsupportedError

pytestmark = SDK_WARNINGS
DATA = make_data([6, 5, 7, 4])
PLAIN = Capabilities()


@pytest.mark.parametrize("capabilities", [None, PLAIN], ids=["by a model", "by a sampler"])
def test_reference(connect: Any, models: Any, capabilities: Capabilities | None) -> None:
    """The base scores as natively: to the bit where a model does it in one call; a sampler knows next tokens only."""
    remote = connect() if capabilities is None else connect(capabilities=capabilities)
    native = twin(models, remote.trainer)
    own = [Datum(ModelInput.from_ints([1, 5, 6, 3][:n]), {"target_tokens": [5, 6, 3, 2][:n]}) for n in (4, 3, 2)]
    found, wanted = (b.reference().forward(own).result().loss_fn_outputs for b in (remote, native))
    near = 0.0 if capabilities is None else 1e-5
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one["logprobs"].to_torch(), other["logprobs"].to_torch(), atol=near, rtol=0)
    assert remote.reference().forward(own).result().loss_fn_outputs == found
    with pytest.raises(ConfigError, match="log-probs only"):
        remote.reference().forward(own, "ppo").result()
    others = [DATA[0].with_inputs(target_tokens=[0] * 6)]
    if capabilities is None:
        assert remote.reference().forward(others).result()
    else:
        with pytest.raises(UnsupportedError, match="next tokens"):
            remote.reference().forward(others).result()


@pytest.mark.parametrize("capabilities", [None, PLAIN], ids=["by a model", "by a sampler"])
def test_the_reference_checks_its_data(connect: Any, capabilities: Capabilities | None) -> None:
    """As every other operation does: at another temperature than 1 its log-probs would be those of no reference."""
    remote = connect() if capabilities is None else connect(capabilities=capabilities)
    own = [Datum(ModelInput.from_ints([1, 5, 6]), {"target_tokens": [5, 6, 3]})]
    reference = remote.reference()
    for temperature, refused in ((1.0, False), (0.5, True)):
        error = reference.forward([d.with_inputs(temperature=[temperature]) for d in own]).exception()
        assert isinstance(error, UnsupportedError) == refused, temperature
    with pytest.raises(InvalidDatumsError, match="data is empty"):
        reference.forward([]).result()
    with pytest.raises(InvalidDatumsError, match="same length"):
        reference.forward([own[0].with_inputs(target_tokens=[5, 6])]).result()
    assert remote.close() is None
    with pytest.raises(ClosedError):
        reference.forward(own)
    with pytest.raises(ClosedError):
        remote.reference()
