"""What a plain service, one that does not say that it is ours, is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_data
from servers import SDK_WARNINGS

from pullback.backends.remote import Capabilities

pytestmark = SDK_WARNINGS
DATA, PLAIN = make_data([6, 5, 7, 4]), Capabilities()


def test_a_plain_service_is_told_the_clip_range(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services differ in the default range of PPO, so that it is sent even where it is ours; a service of ours knows it."""
    for capabilities, expected in (
        (PLAIN, [(0.8, 1.2), (0.5, 1.2)]),
        (None, [(None, None), (0.5, None)]),
    ):
        backend = connect(capabilities=capabilities)
        sent: list[Any] = []
        real = backend.trainer.forward_backward

        def noted(data: Any, loss: str, config: Any, real: Any = real, sent: list[Any] = sent) -> Any:
            sent.append(config or {})
            return real(data, loss, config)

        monkeypatch.setattr(backend.trainer, "forward_backward", noted)
        for config in (None, {"clip_low_threshold": 0.5}):
            backend.forward_backward(DATA, "ppo", config).result()
        backend.forward_backward(DATA, "cross_entropy").result()
        found = [(given.get("clip_low_threshold"), given.get("clip_high_threshold")) for given in sent]
        assert found == [*expected, (None, None)]


@pytest.mark.parametrize("junk", [-200.0, float("nan"), float("-inf")])
def test_what_is_masked_stays_here(connect: Any, junk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose policy losses know no weights is told nothing of masked tokens that could overflow there."""
    backend = connect(capabilities=PLAIN)
    sent: list[Any] = []
    real = backend.trainer.forward_backward

    def noted(data: Any, *rest: Any) -> Any:
        sent.extend(data)
        return real(data, *rest)

    monkeypatch.setattr(backend.trainer, "forward_backward", noted)
    masked = [d.loss_fn_inputs["weights"].to_torch() == 0 for d in DATA]
    changed = [
        d.with_inputs(
            advantages=torch.where(m, 1e6, d.loss_fn_inputs["advantages"].to_torch()),
            logprobs=torch.where(m, junk, d.loss_fn_inputs["logprobs"].to_torch()),
        )
        for d, m in zip(DATA, masked, strict=True)
    ]
    assert backend.forward_backward(changed, "ppo").result().metrics["loss:sum"] == pytest.approx(
        connect(capabilities=PLAIN).forward_backward(DATA, "ppo").result().metrics["loss:sum"]
    )
    for wire, datum, m in zip(sent, DATA, masked, strict=True):
        own = {key: datum.loss_fn_inputs[key].to_torch() for key in ("advantages", "logprobs")}
        found = {key: torch.as_tensor(wire.loss_fn_inputs[key].to_torch()) for key in own}
        assert all(bool((found[key][m] == 0).all()) for key in own)
        assert all(torch.equal(found[key][~m], own[key][~m]) for key in own)
