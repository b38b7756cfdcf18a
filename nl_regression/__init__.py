"""Overparameterised networks on sin(10πx⁴): when they interpolate, and where they stop generalising."""
