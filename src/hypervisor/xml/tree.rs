//! Small helpers over `xmltree`: parsing with limits, paths, deterministic writing.

use xmltree::{Element, EmitterConfig, XMLNode};

use super::{MAX_XML_BYTES, XmlError};

/// libvirt's namespace for QEMU's own arguments.
pub(super) const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// Parses a domain definition.
pub(super) fn parse_domain(xml: &str) -> Result<Element, XmlError> {
    let root = parse(xml)?;
    if root.name != "domain" {
        return Err(XmlError::NotADomain { root: root.name });
    }
    Ok(root)
}

/// Parses any element.
pub(super) fn parse(xml: &str) -> Result<Element, XmlError> {
    if xml.len() > MAX_XML_BYTES {
        return Err(XmlError::TooLong { bytes: xml.len() });
    }
    let nodes = Element::parse_all(xml.as_bytes()).map_err(|e| XmlError::Malformed { reason: e.to_string() })?;
    let element = nodes.into_iter().find_map(|node| match node {
        XMLNode::Element(element) => Some(element),
        _ => None,
    });
    element.ok_or_else(|| XmlError::Malformed { reason: "no element".into() })
}

/// Text of an element, indented, without an XML declaration; attributes in alphabetical order.
pub(super) fn write(element: &Element) -> Result<String, XmlError> {
    let config = EmitterConfig::new().write_document_declaration(false).perform_indent(true);
    let mut bytes = Vec::new();
    let malformed = |reason: String| XmlError::Malformed { reason };
    element.write_with_config(&mut bytes, config).map_err(|e| malformed(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| malformed(e.to_string()))
}

/// Child elements named `name`.
pub(super) fn children<'a>(element: &'a Element, name: &'a str) -> impl Iterator<Item = &'a Element> {
    element.children.iter().filter_map(XMLNode::as_element).filter(move |child| child.name == name)
}

/// Child elements of any name.
pub(super) fn elements_mut(element: &mut Element) -> impl Iterator<Item = &mut Element> {
    element.children.iter_mut().filter_map(XMLNode::as_mut_element)
}

/// The element at the end of a path of child names.
pub(super) fn at<'a>(element: &'a Element, path: &[&str]) -> Option<&'a Element> {
    path.iter().try_fold(element, |current, name| current.get_child(*name))
}

/// An attribute of the element at the end of a path.
pub(super) fn attribute<'a>(element: &'a Element, path: &[&str], name: &str) -> Option<&'a str> {
    at(element, path)?.attributes.get(name).map(String::as_str)
}

/// The text of the element at the end of a path, without blanks around it.
pub(super) fn text(element: &Element, path: &[&str]) -> Option<String> {
    let text = at(element, path)?.get_text()?;
    Some(text.trim().to_owned())
}

/// Removes the child elements for which `remove` says so.
pub(super) fn remove_children(element: &mut Element, mut remove: impl FnMut(&Element) -> bool) {
    element.children.retain(|node| !node.as_element().is_some_and(&mut remove));
}

/// The child element `name`, made at the end if there is none.
pub(super) fn ensure_child<'a>(element: &'a mut Element, name: &str) -> &'a mut Element {
    let position = element.children.iter().position(|node| node.as_element().is_some_and(|child| child.name == name));
    let position = position.unwrap_or_else(|| {
        element.children.push(XMLNode::Element(Element::new(name)));
        element.children.len() - 1
    });
    match &mut element.children[position] {
        XMLNode::Element(child) => child,
        // `position` is that of an element: it was found as one or has just been put there.
        _ => unreachable!("a child element"),
    }
}
