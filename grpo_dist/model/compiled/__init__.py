"""C++ for CPUs: how it is compiled, and what its files share."""
