"""Whether a picture shows its style, which is the part of a class name before the slash: the judge is a linear probe on
features of real training pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arimg.data import EmojiSet
from arimg.errors import InputError
from arimg.evals.held_out import bar
from arimg.evals.picture_sets import Extractor, features_of
from arimg.evals.probe import fit_probe

TRAINING_PICTURES = 4000


class StyleJudge:
    """A probe that has learnt the styles of a data set. Raises InputError when there are none to tell apart."""

    def __init__(self, emoji: EmojiSet, extractor: Extractor, seed: int = 0) -> None:
        self.styles = sorted({style_of(name) for name in emoji.class_names})
        groups = {name.partition("/")[2] for name in emoji.class_names}
        if len(self.styles) < 2 or {f"{style}/{group}" for style in self.styles for group in groups} != set(
                emoji.class_names):
            raise InputError("--styles needs classes style/group, several styles with the same groups; this data set "
                             f"has {', '.join(emoji.class_names[:4])}: leave --styles out")
        self.extractor = extractor
        order = np.random.default_rng(seed).permutation(np.flatnonzero(~emoji.held_out))
        learnt = np.sort(order[:TRAINING_PICTURES])
        labels = np.array([self.styles.index(style_of(name)) for name in emoji.class_names])[emoji.labels[learnt]]
        self.probe = fit_probe(self._features(emoji.images[learnt], "training pictures"), labels)

    def right(self, pixels_NHW3: np.ndarray, class_names: Sequence[str], title: str) -> np.ndarray:
        """right_N bool: whether the probe assigns each picture to the style of its class."""
        wanted_N = [self.styles.index(style_of(name)) for name in class_names]
        return self.probe.predict(self._features(pixels_NHW3, title)) == wanted_N

    def other_style(self, class_name: str) -> str:
        """The same group in the next style."""
        style, _, group = class_name.partition("/")
        return f"{self.styles[(self.styles.index(style) + 1) % len(self.styles)]}/{group}"

    def _features(self, pixels_NHW3: np.ndarray, title: str) -> np.ndarray:
        return features_of(pixels_NHW3, self.extractor, title, bar(f"style of {title}")).features_NC


def style_of(class_name: str) -> str:
    """"noto/animals" -> "noto"."""
    return class_name.partition("/")[0]
