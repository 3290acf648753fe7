"""From ResNet to ResNet: the losses that most papers are compared with."""
