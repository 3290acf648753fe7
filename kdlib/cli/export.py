"""Takes the student of a finished run away, fused where it can be, checked against the run on real images.

  kdlib export runs/riformer --to onnx --import recipes.riformer.run
  kdlib export runs/mine --to timm --out student           timm.create_model("local-dir:student", pretrained=True)
  kdlib export runs/mine --to hub --push me/student        timm.create_model("hf-hub:me/student", pretrained=True)

  to             what is written           what loads it
  safetensors    model.safetensors         timm (and the recipe's module for a model that is not timm's)
  onnx           model.onnx                onnxruntime, nothing else
  torch-export   model.pt2                 torch, nothing else
  timm, hub      config.json, weights      timm (and the recipe's module, as above)

The folder of a run stands for the student of its last epoch; name runs/mine/student_best.safetensors for the best one.

A fused RIFormer is no architecture of timm's: its timm folder loads where recipes.riformer.model was imported; where
kdlib is not, take onnx or torch-export. Each export is a folder with a model card (README.md).

From Python: kdlib.export.export(kdlib.models.find_model("runs/mine"), "onnx", folder).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

FORMATS = ("safetensors", "onnx", "torch-export", "timm", "hub")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run, or a weight file in it")
    parser.add_argument("--to", choices=FORMATS, required=True, help="see above")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export/TO)")
    parser.add_argument("--no-fuse", action="store_true", help="leave the model in its train form")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of onnx and torch-export (default: any)")
    parser.add_argument("--count", type=int, default=256, metavar="N", help="test images to compare on (default: 256)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="with --to hub: upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: as a private repository")


def run(options: Namespace) -> None:
    from ..export import export
    from ..export.hub import push
    from ..models import find_model
    from ..progress import say

    if options.push and options.to != "hub":
        raise ValueError(f"--push goes with --to hub, got --to {options.to}")
    path = Path(options.run).expanduser()
    out = options.out or (path if path.is_dir() else path.parent) / "export" / options.to
    found = find_model(str(path))
    done = export(found, options.to, out, fused=not options.no_fuse, batch_size=options.batch_size, count=options.count)
    form = "fused" if done.fused else "as it was trained"
    say(f"{found.name}, {form}: {done.parameters:,} parameters, {done.bytes / 1e6:.2f} MB in {done.folder}/")
    say(
        f"read back and compared on {done.images} test images: largest difference of a logit {done.difference:.1e}, "
        f"same class on {done.agreement:.2%}"
    )
    say(f"to load it: {done.needs}; how, says {done.folder}/README.md")
    if options.push:
        say(f"pushed to {push(done.folder, options.push, options.private)}")
