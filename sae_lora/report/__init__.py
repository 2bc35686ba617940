"""Tables, figures and the page of a sweep, made only from run folders. Imports no torch."""
