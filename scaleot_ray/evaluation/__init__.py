"""How good a model is: loss, multiple choice, the standard table and the recovered gain G."""
