"""The fast way of completing windows: the numbers of `inpainter.completion`, without the waste."""
