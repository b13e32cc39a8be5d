"""Whether a picture shows its style, which is the part of a class name before the slash: the judge is a linear probe on
features of training pictures.

A tokenizer leaves traces that features see and the eye hardly does. A probe that has never met them takes them for a
style: of reconstructions it tells far fewer right than of originals. So two probes judge: one that learns from training
pictures and from their reconstructions by the model's own tokenizer, and a plain one that learns from pictures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arimg.data import EmojiSet
from arimg.errors import InputError
from arimg.evals.extractors import Extractor
from arimg.evals.held_out import bar
from arimg.evals.picture_sets import features_of
from arimg.evals.probe import fit_probe
from arimg.evals.tokenizer_metrics import reconstruct

TRAINING_PICTURES = 4000
RECONSTRUCTED = 1500            # of these


class StyleJudge:
    """Probes that have learnt the styles of a data set. Raises InputError when there are none to tell apart."""

    def __init__(self, emoji: EmojiSet, tokenizer: Any, extractor: Extractor, seed: int = 0) -> None:
        self.styles = sorted({style_of(name) for name in emoji.class_names})
        groups = {name.partition("/")[2] for name in emoji.class_names}
        if len(self.styles) < 2 or {f"{style}/{group}" for style in self.styles for group in groups} != set(
                emoji.class_names):
            raise InputError("--styles needs classes style/group, several styles with the same groups; this data set "
                             f"has {', '.join(emoji.class_names[:4])}: leave --styles out")
        self.extractor = extractor
        order = np.random.default_rng(seed).permutation(np.flatnonzero(~emoji.held_out))[:TRAINING_PICTURES]
        labels_N = np.array([self.styles.index(style_of(name)) for name in emoji.class_names])[emoji.labels[order]]
        device = next(tokenizer.parameters()).device
        pixels = np.ascontiguousarray(emoji.images[order])
        rebuilt = reconstruct(tokenizer, pixels[:RECONSTRUCTED], device, bar("reconstructions to learn from"))
        plain_NC = self._features(pixels, "training pictures")
        both_NC = np.concatenate([plain_NC, self._features(rebuilt, "training reconstructions")])
        self.probes = {"style_accuracy": fit_probe(both_NC, np.concatenate([labels_N, labels_N[:RECONSTRUCTED]])),
                       "style_accuracy_plain": fit_probe(plain_NC, labels_N)}

    def right(self, pixels_NHW3: np.ndarray, class_names: Sequence[str], title: str) -> dict[str, np.ndarray]:
        """right_N bool for each probe: whether it assigns each picture to the style of its class."""
        wanted_N = [self.styles.index(style_of(name)) for name in class_names]
        features_NC = self._features(pixels_NHW3, title)
        return {name: probe.predict(features_NC) == wanted_N for name, probe in self.probes.items()}

    def other_style(self, class_name: str) -> str:
        """The same group in the next style."""
        style, _, group = class_name.partition("/")
        return f"{self.styles[(self.styles.index(style) + 1) % len(self.styles)]}/{group}"

    def _features(self, pixels_NHW3: np.ndarray, title: str) -> np.ndarray:
        return features_of(pixels_NHW3, self.extractor, title, bar(f"style of {title}")).features.pool_NC


def style_of(class_name: str) -> str:
    """"noto/animals" -> "noto"."""
    return class_name.partition("/")[0]
