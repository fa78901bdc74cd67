"""Where inputs come from: folders, arrays and data sets, as a model takes them."""
