"""MAR's network: rows with different numbers of known tokens, class and null, control, errors."""

from __future__ import annotations

import pytest
import torch

from arimg.errors import ConfigError, InputError
from arimg.models.base import Condition
from arimg.models.mar import MARConfig
from tests.models.toy_continuous import SIDE, toy_inject, toy_mar

LENGTH = SIDE ** 2


def inputs(rows: int = 3) -> tuple[Condition, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, LENGTH, 4, generator=generator, dtype=torch.float64)
    known = torch.rand(rows, LENGTH, generator=generator) < torch.tensor([0.2, 0.7, 0.5])[:rows, None]
    known[-1] = False
    return Condition(class_ids_B=torch.arange(rows) % 3), latents, known


@pytest.mark.parametrize("control", [False, True])
def test_rows_with_different_counts_do_not_mix(control: bool) -> None:
    model, (condition, latents, known) = toy_mar(), inputs()
    assert len(set(known.sum(1).tolist())) == 3
    inject = toy_inject(3) if control else None
    together = model.context(condition, latents, known, inject)
    for j in range(3):
        assert condition.class_ids_B is not None
        own = Condition(class_ids_B=condition.class_ids_B[j:j + 1])
        alone = model.context(own, latents[j:j + 1], known[j:j + 1], None if inject is None else inject[:, j:j + 1])
        torch.testing.assert_close(alone[0], together[j], rtol=0, atol=1e-12)


def test_unknown_tokens_are_not_read() -> None:
    model, (condition, latents, known) = toy_mar(), inputs()
    other = torch.where(known[..., None], latents, torch.nan)
    torch.testing.assert_close(model.context(condition, other.nan_to_num(7.0), known),
                               model.context(condition, latents, known), rtol=0, atol=0)


def test_class_and_null_matter() -> None:
    model, (condition, latents, known) = toy_mar(), inputs()
    null = model.null(condition)
    z, z_null = (model.context(one, latents, known) for one in (condition, null))
    assert (z - z_null).abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.equal(model.class_rows(null), model.fake_latent.expand(3, -1))
    with pytest.raises(InputError, match="a class instead"):
        model.class_rows(Condition(caption_BPC=torch.zeros(1, 2, 3)))


def test_control_reaches_both_sides_and_only_the_first_rows() -> None:
    model, (condition, latents, known) = toy_mar(), inputs()
    inject = toy_inject(3)
    plain = model.context(condition, latents, known)
    assert torch.equal(model.context(condition, latents, known, 0 * inject), plain)
    for k in range(3):
        only = torch.zeros_like(inject)
        only[k] = inject[k]
        assert (model.context(condition, latents, known, only)[0] - plain[0]).abs().max() > 1e-3, k
    first = model.context(condition, latents, known, inject[:, :1])
    torch.testing.assert_close(first[1:], plain[1:], rtol=0, atol=1e-12)
    assert (first[0] - plain[0]).abs().max() > 1e-3


def test_wrong_configs() -> None:
    for changes in ({"encoder_heads": 7}, {"decoder_heads": 5}, {"inject_encoder": (12,)}, {"inject_decoder": (-1,)},
                    {"encoder_dim": 384, "inject_encoder": (0,), "inject_decoder": (0,)}):
        with pytest.raises(ConfigError):
            MARConfig(**changes)                                                # type: ignore[arg-type]


def test_training_mode_drops() -> None:
    model, (condition, latents, known) = toy_mar(), inputs()
    still = model.context(condition, latents, known)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model.context(condition, latents, known), still)
