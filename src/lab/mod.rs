//! Several hosts on one machine: namespaces, bridges, a libvirtd and a virtshadowd for each.
