"""What the kernels need and what they should take, without a GPU: resources by compiling, times by a static model."""
