"""What runs the model, behind one protocol."""
