"""LlamaGen's VQ tokenizer: latents, codes and pixels of every image, losses and usage of its quantiser."""

from __future__ import annotations

import torch

from arimg.interop.vq import vq_from_llamagen
from arimg.tokenizers.vq import CodebookUsage, VQConfig, VQTokenizer
from tests.parity.fixture import Fixture

RENAMED = {
    "codebook_size": "codebook_size", "codebook_embed_dim": "codebook_dim", "codebook_l2_norm": "l2_norm",
    "commit_loss_beta": "commit_beta", "entropy_loss_ratio": "entropy_ratio", "encoder_ch_mult": "multipliers",
    "decoder_ch_mult": "decoder_multipliers", "z_channels": "z_channels", "base_channels": "base_channels",
    "num_res_blocks": "res_blocks", "in_channels": "in_channels",
}
WITHOUT_EFFECT = ("codebook_show_usage", "dropout_p", "norm")   # the buffer tells; eval mode; one norm for all


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs; `in.image<suffix>` has `out.indices<suffix>`, `out.recon<suffix>` and so on."""
    tokenizer = VQTokenizer(config(fixture)).eval()
    tokenizer.load_state_dict(vq_from_llamagen(fixture.state_dict()))
    for name in list(fixture.tensors):
        if name.startswith("in.image"):
            check_image(fixture, tokenizer, suffix=name.removeprefix("in.image"))
    check_training(fixture, tokenizer)


def config(fixture: Fixture) -> VQConfig:
    """The config as the fixture writes it."""
    spec = fixture.spec["config"]
    unknown = set(spec) - set(RENAMED) - set(WITHOUT_EFFECT)
    assert not unknown, f"unknown arguments of the tokenizer: {sorted(unknown)}"
    return VQConfig(**{ours: tuple(spec[theirs]) if "mult" in ours else spec[theirs]
                       for theirs, ours in RENAMED.items() if theirs in spec})


def check_image(fixture: Fixture, tokenizer: VQTokenizer, suffix: str) -> None:
    """Encode one batch, decode it from latents and from codes."""
    images = fixture[f"in.image{suffix}"]
    encoded = tokenizer.encode(images)
    stored_codes_BL = fixture[f"out.indices{suffix}"].view(encoded.codes_BL.shape)
    got = {
        f"out.h{suffix}": tokenizer.latents(images),
        f"out.quant{suffix}": encoded.latents_BChw,
        f"out.indices{suffix}": encoded.codes_BL.flatten(),
        f"out.codebook_entry{suffix}": tokenizer.lookup(stored_codes_BL, encoded.grid),
        f"out.recon{suffix}": tokenizer.decode(encoded.latents_BChw),
        f"out.recon{suffix}_from_code": tokenizer.decode_codes(stored_codes_BL, encoded.grid),
    }
    for name in got.keys() & fixture.tensors.keys():
        fixture.compare(name, got[name])


def check_training(fixture: Fixture, tokenizer: VQTokenizer) -> None:
    """Losses of the quantiser on `out.h`, and the usage after that one batch."""
    losses = tokenizer.quantize(fixture["out.h"])[2]
    fixture.compare("out.vq_loss", losses.vq)
    fixture.compare("out.commit_loss", losses.commit)
    fixture.compare("out.entropy_loss", losses.entropy)
    fixture.compare("out.codebook_usage", torch.tensor(usage(fixture)))


def usage(fixture: Fixture) -> float:
    """Share of codes in use. The original's queue starts full of zeros, which count as uses of code 0; ours starts
    empty and is given them first. Without the queue the original says 0."""
    state = fixture.state_dict()
    if "quantize.codebook_used" not in state:
        return 0.0
    queue = state["quantize.codebook_used"].long()
    counter = CodebookUsage(fixture.spec["config"]["codebook_size"], window=len(queue))
    counter.update(queue)
    return counter.update(fixture["out.indices"])
