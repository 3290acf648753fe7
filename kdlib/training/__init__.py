"""What a training run is made of, from its first step to its last checkpoint; `kdlib.runs` puts it together."""
