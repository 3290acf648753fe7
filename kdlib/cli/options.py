"""What options of several verbs say of themselves."""

MODEL = (
    "a timm name, a mapping with its arguments as in a config ('{name: resnet18, pretrained: true}'), the folder of a "
    "finished run or a weight file in it, a folder that timm loads (export --to timm), or module:function, which is "
    "called without arguments"
)
IMAGE_SIZE = "side of the images in pixels (default: what the model says of itself, else 224)"
