"""Drop-in replacements for parts of other libraries, built on the kernels. Each module names what it replaces."""
