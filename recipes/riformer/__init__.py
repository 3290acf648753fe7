"""RIFormer (CVPR 2023): a vision backbone without token mixers, its teachers, and the recipe that trains it."""
