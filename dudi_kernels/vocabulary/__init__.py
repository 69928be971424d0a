"""What tokens say and how they match: the parts that a `Verbalizer` is made of."""
