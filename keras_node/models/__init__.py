"""Keras models, one public class a file."""
