"""One HTML page that needs no network, with every picture and table of a comparison."""
