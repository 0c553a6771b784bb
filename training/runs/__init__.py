"""What `psr triplets` and `psr train` do, in a folder that can be left and gone on with."""
