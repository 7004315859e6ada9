"""神经网络，以及属于其权重的一切。 Networks, and what belongs to their weights."""
