"""The trainer's side: clients of a server that never import it. Import the modules themselves; this file is empty."""
