"""How each library makes the training step that is compared."""
