"""Keras layers. Each file holds one public class."""
