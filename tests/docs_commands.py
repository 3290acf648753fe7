"""How each command that the docs show is executed by test_docs.py: a new command without an entry here fails."""

from __future__ import annotations

import shlex

import accelerate.commands.launch

RESNET = "accelerate launch recipes/resnet/run.py"
RIFORMER = "accelerate launch recipes/riformer/run.py"
CONFIGS = "recipes/riformer/configs"
STUDY = "accelerate launch recipes/riformer/study.py"
GRAPHS = "compile.mode=compiled-graphs threads=1 data.augment.crop_padding=2"
LIKE = "--rows labels soft 'relation alone' 'windows, λ of the paper' 'whole run, λ of the paper' " \
       "'initial weights, soft' 'whole run, initial weights'"  # fmt: skip
FSDP = "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8"
POLICIES = (
    "TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Block",
    "SIZE_BASED_WRAP --fsdp_min_num_params 1000000",
)
EIGHT = "torchrun --standalone --nproc-per-node 8 run.py"

INSTALLS = ("python3 -m venv ", "pip install ", "git clone ", ". activate", "python -m pytest", "sphinx-build ")
"""What .ci/run does in an empty environment, or any developer."""

SMALL = "data.limit=64 data.batch_size=32 epochs=1 schedule.warmup_epochs=0 baseline.schedule.warmup_epochs=0 threads=1"
SHORT = {
    "resnet": f"{SMALL} teachers.big.recipe.epochs=1 teachers.big.recipe.schedule.warmup_epochs=0",
    "riformer": " ".join(
        [SMALL]
        + [f"teachers.{name}.recipe.epochs=1" for name in ("wide", "twin")]
        + [f"teachers.{name}.recipe.schedule.warmup_epochs=0" for name in ("wide", "twin")]
    ),
}
"""Makes the first run of a recipe a matter of seconds: 64 images, one epoch of each model."""

AS_SHOWN = [
    "kdlib inspect resnet18 --pattern 'layer*.-1'",
    "kdlib inspect resnet18",
    "kdlib inspect '{name: plain, in_chans: 1}' --image-size 28 --import my_models",
    "kdlib inspect '{name: riformer_nano, num_classes: 10, in_chans: 1}' --image-size 28 "
    "--pattern 'stages.*.blocks.-1' --import recipes.riformer.run",
    "kdlib export runs/resnet --to onnx",
    "kdlib export runs/resnet --to torch-export",
    "kdlib export runs/resnet --to timm --out student",
    "sha256sum resnet34.safetensors",
    "cd recipes/riformer/configs",
    "cd docs",
    "accelerate launch ../run.py scales/imagenet_final_m48.yaml rows/tab6_m48.yaml --dry-run",
    "python recipes/riformer/measure/latency.py --size tiny --depth 2 --pixels 64 --batch 2 --runs 5",
    f"{RIFORMER} my.yaml --dry-run",
]
"""Executed to the letter; text right below is their output, and compared."""

WITH = {
    f"{RESNET} save_every=20": SHORT["resnet"],
    f"{RESNET} log_every=10 log_gradients=true output=runs/followed": SHORT["resnet"],
    f"{RESNET} student.weights=runs/resnet/student.safetensors output=runs/resnet_more": SHORT["resnet"],
    f"docs/start.md: {RIFORMER}": SHORT["riformer"],
    "accelerate launch run.py my.yaml epochs=10": "epochs=1 data.limit=64 data.batch_size=32 threads=1 "
    "teachers.big.recipe.epochs=1",
    "kdlib doctor recipes/riformer/configs/default.yaml --import recipes.riformer.run": "--batches 1 --images 8 "
    "data.limit=64 data.batch_size=16 threads=1 --compile off",
    "kdlib doctor recipes/resnet/configs/default.yaml --compile inductor": "--batches 1 --images 8 data.limit=64 "
    "data.batch_size=16 threads=1 --compile aot_eager",
    "kdlib report runs/riformer --import recipes.riformer.run": "",
    "kdlib export runs/riformer --to onnx --import recipes.riformer.run": "--count 32",
}
"""Executed with these words behind them, which make them shorter."""

DRY = [
    RIFORMER,
    f"{RIFORMER} {CONFIGS}/fashion_mnist.yaml",
    RESNET,
    f"{RESNET} recipes/resnet/configs/review_kd.yaml",
    "accelerate launch recipes/deit/run.py",
    "accelerate launch recipes/hetero/run.py",
    "accelerate launch recipes/hetero/run.py recipes/hetero/configs/swin_to_riformer.yaml",
    "accelerate launch ../run.py scales/fashion_mnist_5k.yaml rows/tab3_affine_soft.yaml",
    "accelerate launch ../run.py scales/imagenet.yaml rows/tab3_affine_soft.yaml data.root=/path/to/imagenet",
    "accelerate launch compare.py temperature.yaml --data small.yaml --seeds 3 --jobs 2",
]
"""Minutes, ImageNet or several GPUs: executed with ``--dry-run``, which builds all of it and trains nothing."""

READ = [
    f"{STUDY} ladder --data fashion_mnist_5k --seeds 5 --jobs 16",
    f"{STUDY} ladder --data fashion_mnist_5k --seeds 5 --jobs 40 {GRAPHS} save_every=800",
    f"{STUDY} imitation --data fashion_mnist_5k --seeds 5 --jobs 20 {GRAPHS} save_every=800",
    f"{STUDY} imitation --data fashion_mnist --seeds 3 {LIKE} --jobs 12 {GRAPHS}",
    f"{STUDY} imitation --data fashion_mnist_5k --seeds 3 --out runs/studies/imitation-1k --jobs 8 {GRAPHS} "
    "save_every=800 data.limit=1000 epochs=100 eval_every=10 teachers.wide.recipe.epochs=600 "
    "teachers.wide.recipe.eval_every=100 teachers.twin.recipe.epochs=600 teachers.twin.recipe.eval_every=100",
    f"{STUDY} imitation --data fashion_mnist_5k_final --seeds 3 --out runs/studies/long {LIKE} --jobs 20 {GRAPHS} "
    "save_every=800 data.augment.mixup=0.8 data.augment.cutmix=1.0 eval_every=20",
    f"{STUDY} length --data fashion_mnist_5k --seeds 5 --jobs 40 {GRAPHS} save_every=800",
    f"{STUDY} teachers --data fashion_mnist_5k --seeds 1 --jobs 10 {GRAPHS}",
    f"{STUDY} beginning --data fashion_mnist_5k --seeds 5 --jobs 16 {GRAPHS}",
]
"""Studies of many rows: read by the study's own command line, every row loaded as a recipe; built by test_study.py."""

HELP = [
    "kdlib pairs resnet18 '{name: resnet34, pretrained: true}'",
    "kdlib pairs '{name: resnet18, pretrained: true}' '{name: resnet34, pretrained: true}' --images photos/ "
    "--out alike.png",
    "kdlib doctor my.yaml",
    "kdlib schema --into my.yaml",
    "kdlib report runs/mine",
    "kdlib export runs/mine --to onnx",
    "kdlib export runs/resnet --to hub --push me/student",
    "python recipes/riformer/measure/throughput.py --budget 550 --out throughput.json",
    "python recipes/riformer/measure/throughput.py --models riformer_m36:full riformer_m36:kernels poolformer_m36:timm "
    "gfnet_h_b:real riformer_s12:full riformer_s12:kernels poolformer_s12:timm --settings compiled-bf16-channels_last "
    "eager-bf16-channels_last --batch 128 --budget 160 --out throughput.json",
    "python benchmarks/fused_blocks.py --budget 200 --out benchmarks/results/fused_blocks.json",
    "python benchmarks/inference.py --budget 300",
    "python recipes/riformer/measure/latency.py --out vit_latency.json",
    "python recipes/riformer/measure/latency.py --runs 5 --repeats 5 --out vit_latency.json",
    "python recipes/riformer/measure/receptive_field.py runs/riformer --out field.json",
    "python recipes/riformer/measure/affine_scales.py runs/riformer runs/other --out scales.json",
    "python recipes/riformer/measure/affine_scales.py soft.safetensors imitation.safetensors both.safetensors "
    "--labels 'soft targets' imitation 'imitation, initial weights' --out scales.json",
    "python recipes/riformer/measure/receptive_field.py riformer_micro=start.safetensors "
    "riformer_micro=soft.safetensors riformer_micro=imitation.safetensors riformer_micro=both.safetensors "
    "--labels 'at the start' 'soft targets' imitation 'imitation, initial weights' "
    "--data name=fashion-mnist-5k image_size=64 --stage 2 --out field.json",
    "python benchmarks/step.py --budget 540 --jobs 6 --out benchmarks/results/step.json",
    "python benchmarks/step.py --cpu --rounds 200 --who floor 'by hand' kdlib --out benchmarks/results/step_cpu.json",
    "python benchmarks/scaling.py --processes 1 2 --out benchmarks/results/scaling.json",
    "kdlib shards /data/set train='train-*.tar' …",
    "kdlib shards /data/set train='train-*.tar' validation='val-*.tar' --classes names.txt",
    *(f"{FSDP} --fsdp_auto_wrap_policy {policy} run.py" for policy in POLICIES),
]
"""A GPU, a download, an upload, or runs that the page does not make: ``--help``, in which their options must be."""


STREAMS = [
    "data.name=wds/ data.root=/data/set",
    "data.name=wds/ data.root=https://HOST/set data.classes=1000",
    "data.name=hfids/OWNER/SET 'data.splits=[train, test]'",
]
"""Large data and eight GPUs: the config is checked."""


def _help(command: str) -> str:
    if command.startswith(FSDP):
        return f"python {accelerate.commands.launch.__file__} --help"
    return f"{shlex.join(shlex.split(command)[: 3 if command.startswith('accelerate') else 2])} --help"


COMMANDS: dict[str, str | None] = {
    **dict.fromkeys(AS_SHOWN),
    **{
        command: f"{command.partition(': ')[2] if '.md: ' in command else command} {words}"
        for command, words in WITH.items()
    },
    **{command: f"{command} --dry-run" for command in [*DRY, *READ]},
    **{command: _help(command) for command in HELP},
    **{f"{EIGHT} {words}": f"{RESNET} {words} --print-config" for words in STREAMS},
}
"""The command as shown, or ``page: command``, to what is executed; None is the command itself."""
