"""One module for each backend; they share a contract and never import each other."""
