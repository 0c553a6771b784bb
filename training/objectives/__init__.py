"""The losses that an adapter is trained by, and the penalties beside them."""
