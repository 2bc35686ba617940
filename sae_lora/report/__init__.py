"""Tables, figures and the page of a sweep, made from run folders alone. Imports no torch."""
