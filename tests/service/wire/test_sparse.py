"""Sparse matrices on the wire: the cells that are listed, in protobuf and JSON, in requests and in answers."""

from __future__ import annotations

from typing import Any

import pytest
import tinker
import torch
from hypothesis import given
from hypothesis import strategies as st
from servers import SDK_WARNINGS, finished, json_datum, new_model

from pullback.service.wire.json_form import decode_json_sparse, decode_json_tensor
from pullback.service.wire.sparse import SparseRows

pytestmark = SDK_WARNINGS
PROMPT = [5, 9, 2, 7, 1, 3, 8, 4]


@st.composite
def matrices(draw: Any) -> torch.Tensor:
    """Return an int64 matrix of which a part of the cells, or none, is 0."""
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(1, 6))
    cells = draw(st.lists(st.sampled_from([0, 0, 3, 7, -2]), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(cells, dtype=torch.int64).reshape(rows, columns)


def in_rows(whole: torch.Tensor) -> SparseRows:
    """Return the cells that are not 0, found one by one."""
    listed = [(i, j) for i in range(whole.shape[0]) for j in range(whole.shape[1]) if whole[i, j] != 0]
    offsets = [sum(row < i for row, _ in listed) for i in range(whole.shape[0] + 1)]
    values = torch.tensor([int(whole[i, j]) for i, j in listed], dtype=torch.int64)
    columns = torch.tensor([j for _, j in listed], dtype=torch.int64)
    return SparseRows.of(values, torch.tensor(offsets), columns, list(whole.shape))


@given(matrices())
def test_the_listed_cells_are_the_whole(whole: torch.Tensor) -> None:
    """Filled up, packed side by side, or as JSON: nothing is lost, and nothing is listed twice."""
    sparse = in_rows(whole)
    assert torch.equal(sparse.dense(), whole)
    packed = sparse.packed(-1)
    for row, cells in zip(whole.tolist(), packed.tolist(), strict=True):
        listed = [cell for cell in row if cell]
        assert cells == listed + [-1] * (packed.shape[1] - len(listed))
    assert torch.equal(sparse.unpacked(packed).dense(), whole)
    text = {
        "data": sparse.values.tolist(),
        "dtype": "int64",
        "shape": list(whole.shape),
        "sparse_crow_indices": sparse.offsets.tolist(),
        "sparse_col_indices": sparse.columns.tolist(),
    }
    assert torch.equal(decode_json_tensor(text), whole)


GOOD: dict[str, Any] = {
    "data": [4, 5, 6],
    "dtype": "int64",
    "shape": [2, 3],
    "sparse_crow_indices": [0, 1, 3],
    "sparse_col_indices": [2, 0, 1],
}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"shape": [6]}, "rows and columns"),
    ({"shape": [2, -3]}, "rows and columns"),
    ({"shape": [2, 1 << 31]}, "rows and columns"),
    ({"data": [4, 5]}, "row offsets"),
    ({"sparse_crow_indices": [0, 3]}, "row offsets"),
    ({"sparse_crow_indices": [1, 1, 3]}, "row offsets"),
    ({"sparse_crow_indices": [0, 4, 3]}, "row offsets"),
    ({"sparse_crow_indices": [0, 1.5, 3]}, "whole numbers"),
    ({"sparse_col_indices": [3, 0, 1]}, "columns"),
    ({"sparse_col_indices": [-1, 0, 1]}, "columns"),
    ({"sparse_col_indices": [2, 1, 1]}, "columns"),
    ({"sparse_col_indices": [2, 1, 0]}, "columns"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_what_is_no_sparse_matrix_is_refused(change: dict[str, Any], words: str) -> None:
    """Each part must fit the others; the whole matrix, as a control, is read."""
    assert decode_json_tensor(GOOD).tolist() == [[0, 0, 4], [5, 6, 0]]
    with pytest.raises(ValueError, match=words):
        decode_json_sparse(GOOD | change)


def test_only_so_many_cells_are_filled_up() -> None:
    """A matrix of a few listed cells may be of any width, and is refused where its cells would have to be made."""
    wide = GOOD | {"shape": [2, 1 << 30]}
    assert decode_json_sparse(wide).packed(-1).tolist() == [[4, -1], [5, 6]]
    with pytest.raises(ValueError, match="cells"):
        decode_json_tensor(wide)


def test_the_sdk_asks_for_a_few_cells(service: Any) -> None:
    """The SDK's own sparse tensor is answered in its layout, with the scores that the dense one gets."""
    wanted = torch.full((len(PROMPT) - 1, 4), -1)
    wanted[1, 2], wanted[1, 3], wanted[5, 0], wanted[6, 1] = 0, 7, 3, 3
    sampler = service.create_sampling_client(base_model="tiny").result()

    def ask(target: Any) -> Any:
        params = tinker.SamplingParams(max_tokens=1, seed=1)
        found = sampler.sample(tinker.ModelInput.from_ints(PROMPT), 1, params, target_prompt_logprobs=target)
        return found.result().target_prompt_logprobs

    dense = ask(tinker.TensorData.from_torch(wanted))
    sparse = ask(tinker.TensorData.from_torch_sparse(wanted, pad_value=-1))
    assert sparse.sparse_crow_indices == [0, 0, 2, 2, 2, 2, 3, 4]
    assert sparse.sparse_col_indices == [2, 3, 0, 1]
    assert bool((sparse.to_torch()[wanted >= 0] < -0.1).all())
    torch.testing.assert_close(sparse.to_torch(), dense.to_torch(), atol=1e-6, rtol=0)


def test_json_carries_sparse_matrices_both_ways(url: str, web: Any) -> None:
    """In a request and in its answer; what is broken fails the one request that holds it, as its user's mistake."""
    http = web(url)
    session, model = new_model(http)
    http.post(
        "create_sampling_session", json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    )
    target = {**GOOD, "shape": [7, 3], "sparse_crow_indices": [0, 1, 1, 3, 3, 3, 3, 3]}
    body = {
        "sampling_session_id": f"{session}:sample:0",
        "prompt": {"chunks": [{"tokens": PROMPT, "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 1},
    }
    for number, changed in enumerate((target, {**target, "sparse_col_indices": [2, 1, 0]}, {**target, "data": [4]}, 7)):
        sent = http.post("asample", json={**body, "target_prompt_logprobs": changed, "seq_id": number})
        found = finished(http, sent.json()["request_id"])
        if number:
            assert found["category"] == "user"
            assert "target_prompt_logprobs cannot be read" in found["error"]
            continue
        scores = found["target_prompt_logprobs"]
        assert {k: scores[k] for k in target if k.startswith("s")} == {
            k: target[k] for k in target if k.startswith("s")
        }
        assert all(score < 0 for score in scores["data"])
    datum = json_datum([1, 2])
    datum["loss_fn_inputs"] = {
        "target_tokens": {"data": [4, 5, 6, 7], "dtype": "int64", "shape": [2, 2]},
        "weights": {**GOOD, "data": [1.0, 0.5], "dtype": "float32", "shape": [2, 2]}
        | {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [1, 0]},
    }
    dense = {**datum, "loss_fn_inputs": {**datum["loss_fn_inputs"]}}
    dense["loss_fn_inputs"]["weights"] = {"data": [0.0, 1.0, 0.5, 0.0], "dtype": "float32", "shape": [2, 2]}
    losses = []
    for number, one in enumerate((datum, dense), 1):
        inner = {"data": [one], "loss_fn": "cross_entropy"}
        sent = http.post("forward", json={"model_id": model["model_id"], "seq_id": number, "forward_input": inner})
        losses.append(finished(http, sent.json()["request_id"])["metrics"]["loss:sum"])
    assert losses[0] == losses[1] > 0
