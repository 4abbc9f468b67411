"""State: checkpoints that hold everything, and initial weights that a seed determines."""

from __future__ import annotations

from typing import Any, Final

import torch

from ....backends.types import SamplingParams
from ....datums.types import ModelInput
from ....errors import UnsupportedError
from ...agreement import sampling_agreement
from ...under_test import BackendUnderTest, closing
from ..actions import scaled, train
from ..check import Evidence, NotApplicable, check, require

__all__ = ["STATE"]

_SEEN: Final = 1e-3  # relative difference of two updates, which are otherwise equal to the bit


@check("moments that are not saved, or not loaded, or kept where only weights are loaded")
def checkpoints_hold_everything(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A run resumed with the optimizer continues as if uninterrupted; without the optimizer it does not."""
    data, params = under_test.data(), under_test.params
    one_step = train(params, [data])
    with under_test.backend() as backend:
        for _ in range(2):
            train(params, [scaled(data, 4.0)])(backend)  # so that warm moments make a smaller step than cold ones
        path = backend.save_state("conformance").result().path
        one_step(backend)
        uninterrupted = under_test.probe(backend)
        backend.load_state_with_optimizer(path).result()
        one_step(backend)
        resumed = under_test.probe(backend)
        colds = []
        for _ in range(2):
            backend.load_state(path).result()
            one_step(backend)
            colds.append(under_test.probe(backend))
    cold, cold_again = colds
    apart = float((resumed - cold).norm() / (resumed - under_test.start()).norm())
    evidence.note(cold_against_resumed=apart)
    difference = under_test.require_same("a resumed run", uninterrupted, resumed)
    evidence.note(difference=difference)
    require(apart > max(_SEEN, 10 * difference), "a cold optimizer makes the same step as a warm one")
    words = "loading the weights alone, twice: a step depends on what was trained before"
    evidence.note(cold_twice=under_test.require_same(words, cold, cold_again))


@check("weights that are saved in another dtype, merged, or from another step")
def checkpoints_restore_log_probs(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """After loading, with the optimizer or without, log-probs are those at the time of saving."""
    one_step = train(under_test.params, [under_test.data()])
    with under_test.backend() as backend:
        one_step(backend)
        saved = under_test.probe(backend)
        path = backend.save_state("conformance-scores").result().path
        one_step(backend)
        moved = float((under_test.probe(backend) - saved).abs().max())
        backend.load_state(path).result()
        weights_only = float((under_test.probe(backend) - saved).abs().max())
        one_step(backend)
        backend.load_state_with_optimizer(path).result()
        everything = float((under_test.probe(backend) - saved).abs().max())
    evidence.note(moved_nats=moved, weights_only_nats=weights_only, everything_nats=everything)
    for words, error in (("load_state", weights_only), ("load_state_with_optimizer", everything)):
        require(error <= under_test.nats / 10, f"{words}: log-probs are {error:.2e} nats from those that were saved")


@check("a seed that no part of the server reads")
def seeds_determine_initial_weights(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Two models made with one seed train alike, and one made with another seed does not."""
    if under_test.seeded is None:
        raise NotApplicable("there is no choice of seed")
    start = under_test.start()

    def trained(seed: int) -> torch.Tensor:
        assert under_test.seeded is not None
        with closing(under_test.seeded(seed)) as backend:
            train(under_test.params, [under_test.data()])(backend)
            return under_test.probe(backend)

    first, again, another = (trained(seed) for seed in (0, 0, 1))
    size = float((first - start).norm())
    same, other = float((first - again).norm()) / size, float((first - another).norm()) / size
    evidence.note(same_seed=same, other_seed=other)
    require(same <= under_test.tolerance, f"two models of one seed: the updates differ by {same:.2e} of their size")
    require(other > under_test.tolerance, "two models of different seeds make the same update")


@check("log-probs of the tempered or cut distribution, or a sampler on old weights")
def samples_carry_the_policys_log_probs(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A sampled token's log-prob is what forward says of it, at any temperature, and after a step too."""
    prompts = _prompts(under_test)
    with under_test.backend() as backend:
        sampling = _sampling(backend)
        for moment in ("at the start", "after a step"):
            for temperature in (1.0, 0.7):
                params = SamplingParams(max_tokens=8, temperature=temperature, seed=0, stop=())
                found = sampling_agreement(sampling, prompts, n=2, params=params)
                words = f"{moment}, temperature {temperature:g}"
                evidence.note(**{f"{words}, nats": found.largest})
                sentence = f"{words}: sampled log-probs are up to {found.largest:.2e} nats from forward's"
                require(found.largest <= under_test.nats, sentence)
            train(under_test.params, [under_test.data()])(backend)


@check("a seed that is ignored, shared by all prompts of a batch, or used up by other requests")
def sampling_seeds_repeat(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A seed repeats its samples, alone or beside other prompts; another seed draws others, and so does each sample."""
    prompts = _prompts(under_test)
    with under_test.backend() as backend:
        sampling = _sampling(backend)

        def drawn(seed: int, asked: list[ModelInput]) -> list[list[int]]:
            params = SamplingParams(max_tokens=12, seed=seed, stop=())
            rollouts = sampling.sample(asked, 3, params).result()
            return [r.tokens for r in rollouts if r.prompt_index == 0]

        first, again, alone, other = drawn(1, prompts), drawn(1, prompts), drawn(1, prompts[:1]), drawn(2, prompts)
    evidence.note(different_samples_of_one_prompt=len({tuple(tokens) for tokens in first}))
    require(first == again, "the same seed gives other samples")
    require(first == alone, "the same seed gives other samples where the prompt is alone")
    require(first != other, "another seed gives the same samples")
    require(len({tuple(tokens) for tokens in first}) > 1, "all samples of one prompt are the same")


def _prompts(under_test: BackendUnderTest) -> list[ModelInput]:
    return [ModelInput.from_ints(d.model_input.tokens[:2]) for d in under_test.data()[:3]]


def _sampling(backend: Any) -> Any:
    if not hasattr(backend, "sample"):
        raise UnsupportedError("the backend has no verb to sample")
    return backend


STATE: Final = (
    checkpoints_hold_everything,
    checkpoints_restore_log_probs,
    seeds_determine_initial_weights,
    samples_carry_the_policys_log_probs,
    sampling_seeds_repeat,
)
