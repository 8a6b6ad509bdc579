"""Searching for tensor types under a byte budget: pure arithmetic over tables that the build measured."""
