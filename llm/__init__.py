"""Language models with parts from models of the hippocampus: blocks, data, training, export."""
