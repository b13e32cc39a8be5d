"""Which decoder a call means: by its name or as an object, with the network of its own that some need."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from arimg.accel.base import Decoder
from arimg.accel.verify import Verify, VerifyScales
from arimg.errors import InputError
from arimg.models.base import Order, order_of
from arimg.registry import DECODERS

ORDERS = {"raster": "token by token", "scales": "scale by scale", "continuous": "continuous tokens"}


def orders_of(decoder: Any) -> tuple[Order, ...]:
    """All orders in which a decoder, or the class of one, paints: that of its attribute `order`, or several in `orders`
    where the order is that of a network it is yet to be given."""
    return getattr(decoder, "orders", (order_of(decoder),)) if not hasattr(decoder, "order") else (decoder.order,)


def second_network(decoder: Any) -> str | None:
    """The name under which a pipeline lists the network that a decoder takes as its first argument; None = it takes
    none."""
    name: str | None = getattr(decoder, "second_network", None)
    return name


def find_decoder(decoder: str | Decoder, model: Any, networks: Mapping[str, Any], window: int | str | None = None,
                 lossy: bool = False, verify: bool = False) -> Decoder:
    """The decoder of this name for `model`, with this window (None = its own), or `decoder` itself. `networks`: those
    of single decoders, by `second_network`. `verify` makes the codes of a one-step decoder the model's own.

    Raises UnknownNameError, and InputError on a decoder for another order of tokens, one whose network is missing, a
    window that it does not take, one that cannot be verified, and one that changes the model's law unless `lossy`
    allows it.
    """
    part = DECODERS.load(decoder) if isinstance(decoder, str) else decoder
    name = decoder if isinstance(decoder, str) else type(decoder).__name__
    check_order(name, part, model)
    options = {} if window is None else {"window": window}
    built: Decoder
    if isinstance(decoder, str):
        built = _named(decoder, {} if verify else options, networks)
    elif options and not verify:
        raise InputError(f"window {window} beside a decoder object: give the window to the object itself")
    else:
        built = decoder
    if verify:
        built = _verifying(name, built, options)
    if built.guarantee == "none" and not lossy:
        verified = "--verify (verify=True) to get the model's own picture, " if _drafts(built) else ""
        raise InputError(f"the decoder {name} does not keep the model's law: add {verified}--lossy (lossy=True) to "
                         f"accept that, or use one that does ({', '.join(_lawful(order_of(built)))})")
    return built


def check_order(name: str, decoder: Any, model: Any) -> None:
    """Raises InputError when the decoder is for networks that predict tokens in another order than this one."""
    orders, own = orders_of(decoder), order_of(model)
    if own not in orders:
        raise InputError(f"the decoder {name} paints {' or '.join(ORDERS[order] for order in orders)}, but this model "
                         f"{ORDERS[own]}; use {' or '.join(_lawful(own))}")


def needs_network(name: str, order: Order) -> InputError:
    """What to say of a decoder whose network a model does not have."""
    key = second_network(DECODERS.load(name))
    return InputError(f"the decoder {name} paints with a network of its own, and this model has no decoders/{key}; "
                      f"give one (Python: pipe.decoders[\"{key}\"] = network, then pipe.save_pretrained(FOLDER)), or "
                      f"use {' or '.join(_lawful(order))}")


def _named(name: str, options: dict[str, Any], networks: Mapping[str, Any]) -> Decoder:
    factory = DECODERS.load(name)
    key = second_network(factory)
    if options and "window" not in inspect.signature(factory).parameters:
        raise InputError(f"--window {options['window']}: the decoder {name} has no window; leave it out, or use jacobi")
    if key is None:
        plain: Decoder = factory(**options)
        return plain
    if key not in networks:
        raise needs_network(name, orders_of(factory)[0])
    built: Decoder = factory(networks[key], **options)
    return built


def _drafts(decoder: Decoder) -> bool:
    """Whether its codes are guesses that the model can verify: those of a student or generator, for its noise."""
    return second_network(decoder) is not None and order_of(decoder) != "continuous"


def _verifying(name: str, draft: Decoder, options: dict[str, Any]) -> Decoder:
    if not _drafts(draft):
        raise InputError(f"--verify: the decoder {name} guesses nothing that could be verified; leave it out, or use a "
                         "one-step decoder (dd1, dd2)")
    if order_of(draft) == "raster":
        return Verify(draft, **options)
    if options:
        raise InputError(f"--window {options['window']}: scales are verified all at once; leave it out")
    return VerifyScales(draft)


def _lawful(order: Order) -> list[str]:
    """Names of the decoders that serve this order, keep the model's law and need no other network."""
    decoders = {name: DECODERS.load(name) for name in DECODERS.names()}
    return [name for name, decoder in decoders.items() if order in orders_of(decoder)
            and second_network(decoder) is None and decoder().guarantee != "none"]
