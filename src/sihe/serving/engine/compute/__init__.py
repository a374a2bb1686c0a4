"""How a step is computed: by torch on any device (`paged`), or by our own kernels on a CPU (`cpu`)."""
