"""Shows the modules of a model, so that nobody guesses a tap.

  kdlib inspect resnet18 --depth 2
  kdlib inspect vit_tiny_patch16_224 --pattern 'blocks.*'
  kdlib inspect '{name: riformer_s12, num_classes: 10}' --import recipes.riformer.run
  kdlib inspect runs/riformer --import recipes.riformer.run

A name in the list taps what that module returns; with :input behind it, what it is given.

From Python: kdlib.inspect.inspect(model, images); kdlib.models.find_model(MODEL).model is the model.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .options import IMAGE_SIZE, MODEL


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help=IMAGE_SIZE)
    parser.add_argument("--depth", type=int, metavar="N", help="levels of the tree to show (default: all)")
    parser.add_argument("--pattern", metavar="P", help="only these modules: * is every child, -1 the last one")


def run(options: Namespace) -> None:
    from rich.text import Text

    from ..inspect import inspect
    from ..models import find_model
    from ..progress import say
    from .show import short_number, show_table, times

    if options.depth is not None and options.depth < 1:
        raise ValueError(f"--depth is at least 1, got {options.depth}")
    found = find_model(options.model, options.image_size)
    nodes = inspect(found.model, found.noise(1), options.depth, options.pattern)
    rows = []
    for node in nodes:
        parent, dot, child = node.tap.rpartition(".")
        tap = Text.assemble((parent + dot, "dim"), child)
        shape = Text(node.note, style="yellow") if node.note else times(node.shape)
        rows.append(
            (tap, node.kind, shape, node.layout, f"{node.parameters:,}", short_number(node.flops) if node.flops else "")
        )
    show_table(("tap", "module", "returns", "layout", "parameters", "FLOPs"), rows, right=("parameters", "FLOPs"))
    whole = inspect(found.model, found.noise(1), depth=1)
    flops = short_number(sum(node.flops for node in whole))
    count = sum(p.numel() for p in found.model.parameters())
    say(f"\n{found.name}: {count:,} parameters, {flops}FLOPs an image of {times(found.shape)}")
