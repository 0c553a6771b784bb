"""The frozen model's two branches, layer by layer, and what of them is kept between epochs."""
