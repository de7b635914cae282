"""The front end's side: a queue of jobs before groups of workers. Imports no torch."""
