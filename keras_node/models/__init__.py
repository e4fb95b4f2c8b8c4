"""Keras models. Each file holds one public class."""
