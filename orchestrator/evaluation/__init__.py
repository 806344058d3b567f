"""How good it was: graders, statistics and the summary made of them."""
