"""A linear probe: multinomial logistic regression on fixed features, to ask what a picture lets a reader tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.errors import InputError

L2 = 1e-3                   # weight of |W|^2 / 2, on standardised features
STEPS = 200


@dataclass(frozen=True)
class Probe:
    """Standardise, then one linear layer."""

    mean_C: Tensor          # float64, as all members
    deviation_C: Tensor
    weight_CK: Tensor
    bias_K: Tensor

    def predict(self, features_NC: np.ndarray) -> np.ndarray:
        """labels_N int64, the likeliest class."""
        standard_NC = (torch.from_numpy(features_NC).double() - self.mean_C) / self.deviation_C
        return (standard_NC @ self.weight_CK + self.bias_K).argmax(1).numpy()


def fit_probe(features_NC: np.ndarray, labels_N: np.ndarray) -> Probe:
    """Minimise mean cross entropy + L2 / 2 |W|^2 with L-BFGS from zero: convex, so the same in every run.

    Raises InputError when the labels hold fewer than two classes.
    """
    classes = int(labels_N.max()) + 1 if len(labels_N) else 0
    if len(np.unique(labels_N)) < 2:
        raise InputError("a probe needs pictures of at least 2 classes to tell apart; give a data set with more")
    raw_NC, labels = torch.from_numpy(features_NC).double(), torch.from_numpy(labels_N)
    mean_C, deviation_C = raw_NC.mean(0), raw_NC.std(0)
    deviation_C = torch.where(deviation_C > 0, deviation_C, 1.0)
    standard_NC = (raw_NC - mean_C) / deviation_C
    weight_CK = torch.zeros(raw_NC.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CK, bias_K], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standard_NC @ weight_CK + bias_K, labels) + L2 / 2 * weight_CK.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Probe(mean_C, deviation_C, weight_CK.detach(), bias_K.detach())
